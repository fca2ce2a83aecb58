"""Many sequences in one batch, whose rows join and leave."""
