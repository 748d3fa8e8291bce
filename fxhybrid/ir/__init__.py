"""The planning problem as data, without torch: problem, plan, schedule, simulator."""
