"""Plans for devices that are not this one."""
