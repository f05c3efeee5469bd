//! Log lines: where they go and how they look.
