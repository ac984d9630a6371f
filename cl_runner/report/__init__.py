"""Many runs read back from their folders: their states, one table, one page. Nothing here imports torch."""
