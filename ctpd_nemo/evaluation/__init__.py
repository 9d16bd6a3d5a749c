"""What a finished student is worth: preferences, generations, benchmarks, and the card that says so."""
