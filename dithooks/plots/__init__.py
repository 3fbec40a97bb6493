"""Pictures of plans, decisions and samples; ``dithooks.plot`` has the public names."""
