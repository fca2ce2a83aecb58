"""One sequence of tokens: choosing them on the GPU or on the host, sessions, drafts, texts."""
