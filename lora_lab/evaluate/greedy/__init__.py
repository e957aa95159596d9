"""Greedy answers of batches: a shared beginning is computed once, and rows that have ended cost nothing."""
