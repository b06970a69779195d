"""The parts of `models.tokenizer`: vocabularies, special tokens, positions of tokens, chat templates."""
