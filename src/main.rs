//! The `sidegate` command.

use std::process::ExitCode;

/// A proxy's requests are many small allocations of few sizes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    sidegate::cli::main()
}
