"""From what a user names to what a model reads: files to pictures, pictures and words to a `Prompt`."""
