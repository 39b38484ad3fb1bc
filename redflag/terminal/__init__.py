"""The verbs that write to a terminal: generate, chat, show, audit-log."""
