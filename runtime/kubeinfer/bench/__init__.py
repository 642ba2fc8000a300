"""Measures engines and servers: ``kubeinfer bench throughput | latency | serve``."""
