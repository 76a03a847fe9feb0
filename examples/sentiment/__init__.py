"""Market headlines labelled by topic, with an alarm where a topic turns, and costs that are not the same both ways."""
