"""Remote plans: for devices other than this one."""
