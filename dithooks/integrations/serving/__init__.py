"""What the adapters of servers share: their plans, and the cache that goes from one request to the next."""
