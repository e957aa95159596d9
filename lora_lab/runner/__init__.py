"""One job: load, attach, train, save, score, record."""
