"""What faces a user: the guard, and the verbs and servers built on it."""
