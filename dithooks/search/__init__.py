"""From one recorded run to what is best for it."""
