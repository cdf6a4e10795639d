"""Learning to pronounce English words: an example of torch_selfattn (see README.md)."""
