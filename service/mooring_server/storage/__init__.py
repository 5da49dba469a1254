"""SQL rows (SQLite or PostgreSQL) and objects: a leaf that knows nothing of models or gRPC."""
