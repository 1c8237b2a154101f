//! `zeroring-loadtest`: see `zeroring-loadtest help` and `docs/benchmarks/README.md`.

use std::process::ExitCode;

/// The generator shares its machine with what it measures: its own cost is to be small.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match zeroring_loadtest::cli::main(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
