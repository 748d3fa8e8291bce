"""What this device really does: seconds, allocator peaks, free memory."""
