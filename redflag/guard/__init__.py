"""The guard: a conversation goes in, judged events come out."""
