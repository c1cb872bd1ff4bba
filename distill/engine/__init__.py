"""The processes of a job: how they join, the groups and devices, DeepSpeed behind one door, copies of the state in memory."""
