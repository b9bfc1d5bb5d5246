"""Mixture-density transformers with memory slots on normalised gaps of zeta zeros.

What the data allows is in `limits` (the exact floor of the random-matrix law) and what a linear
predictor reaches in `autoregression`: every score of a model is read beside those.
"""
