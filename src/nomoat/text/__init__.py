"""Text in and out of a model: tokens, chat templates, streaming."""
