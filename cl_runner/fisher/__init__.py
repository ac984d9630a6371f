"""The Fisher information: how it is estimated and how it is represented."""
