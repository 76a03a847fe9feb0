"""GSM8K: word problems of primary school, with an instruct model of the Hub."""
