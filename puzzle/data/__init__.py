"""Text as packed tokens: sources, splits, mixtures, chats, and batches of windows."""
