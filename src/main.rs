//! The `zeroring` binary.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Words that are not UTF-8 mean nothing; shown as unknown ones.
    let args: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    // The panic itself was logged; orchestrators know a bug by its exit code.
    let exit = std::panic::catch_unwind(|| zeroring::node::cli::main(&args));
    exit.unwrap_or(zeroring::node::Exit::Bug).into()
}
