"""From prompts to answers: forward passes, slots, sampling. `load` and `Model` live here."""
