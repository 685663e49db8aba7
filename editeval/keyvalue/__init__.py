"""The maths that methods share: where the subject ends, key statistics, target values, solves, gradients; and what those are to take."""
