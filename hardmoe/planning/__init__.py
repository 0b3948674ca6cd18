"""What a run will take before it is begun: every stage's work, simulated on the scheduler that will run it."""
