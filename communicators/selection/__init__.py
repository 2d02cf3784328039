"""Which communicator serves a request: opening them, measured tables, the dispatcher, tuning."""
