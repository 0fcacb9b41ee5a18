"""Memory and queues of what computes."""
