"""Parts of `models.tokenizer`: vocabularies, special tokens, token positions, chat templates."""
