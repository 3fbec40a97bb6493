"""Pictures of plans, decisions and samples."""
