"""Data sets made into tasks."""
