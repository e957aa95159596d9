"""Log-likelihoods from a prefix tree: every token that requests share goes through the model once."""
