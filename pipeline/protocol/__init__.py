"""What orchestrator and stages say to each other, and how they meet and part."""
