//! The `sidegate` command.

use std::process::ExitCode;

/// A proxy's requests are many small allocations of few sizes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // The allocator asks for huge pages, and with them the whole of every buffer is resident, however little
    // of it is used: 55 KiB for each open stream, and 30 without. Where this is refused, it costs just that.
    #[cfg(target_os = "linux")]
    let _refused = rustix::thread::disable_transparent_huge_pages(true);
    sidegate::cli::main()
}
