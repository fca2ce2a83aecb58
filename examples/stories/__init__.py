"""A small story-telling, question-answering language model: data, training, evaluation and ExecuTorch export."""
