"""The shared maths of locate-then-edit methods: where the subject ends, key statistics, target values, solves."""
