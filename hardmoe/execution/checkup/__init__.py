"""What `hardmoe doctor` looks at: facts about a machine, measured there, and findings, judged by the driver."""
