"""Experiments over an emulated link: who asks, who answers, what the wire did, and what that says of the claims."""
