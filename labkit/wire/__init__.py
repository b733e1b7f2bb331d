"""The gRPC interface: its definition (``generation.proto``) and the code that protoc makes of it."""
