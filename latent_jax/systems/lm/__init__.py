"""A plain language model on the shared decoder, and the tiny reader that is made with it."""
