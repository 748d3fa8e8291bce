"""What writes and reads the formats: plain ATen, compiled C++, Triton."""
