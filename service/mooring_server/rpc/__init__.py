"""The gRPC edge: thin servicers over storage, jobs and the engine; the interceptor; names and statuses."""
