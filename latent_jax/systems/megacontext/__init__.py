"""MegaContext: a gist tree, a learned focus, and a fixed-size working context over its history."""
