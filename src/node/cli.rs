//! The command line: `zeroring [run] [options]`, other subcommands, usage.
//!
//! The binary may also be called `zero-cache`: then every word is an option, as in the original.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use super::{Exit, capacity, context, logging, run};
use crate::options::config::LogFormat;
use crate::options::{
    self, ConfigError, Loaded, OptionError, Options, Parsed, Surroundings, help, parse,
};

/// Subcommands and what they are for.
const COMMANDS: [(&str, &str); 5] = [
    ("run", "Run the server (the default)."),
    ("demo", "Show a page of live queries over a private, throw-away Postgres."),
    ("loadtest", "Generate load and measure (`zeroring loadtest help`)."),
    ("capacity", "Say how much more a running node holds, and what runs out first."),
    ("doctor", "Check Postgres, disk and settings. Not there yet."),
];

/// The load generator's program.
const LOADTEST: &str = "zeroring-loadtest";

/// Runs the program. `args` begin with the program's name.
pub fn main(args: &[String]) -> Exit {
    let (name, words) =
        args.split_first().map_or(("zeroring", args), |(n, rest)| (n.as_str(), rest));
    let file_name = Path::new(name).file_name().and_then(|name| name.to_str());
    if file_name == Some("zero-cache") {
        return serve(words, "");
    }
    let intro = intro();
    match words.split_first() {
        Some((command, rest)) if command == "run" => serve(rest, &intro),
        Some((command, rest)) if command == "demo" => demo(rest),
        Some((command, rest)) if command == "loadtest" => loadtest(rest),
        Some((command, rest)) if command == "capacity" => capacity(rest),
        Some((command, _)) if COMMANDS.iter().any(|(known, _)| known == command) => {
            print_err(&format!("`{command}` is not in this version of zeroring yet.\n"));
            Exit::Failed
        }
        Some((command, _)) if command == "--version" || command == "-V" => {
            print(&format!("zeroring {}\n", env!("CARGO_PKG_VERSION")));
            Exit::Done
        }
        _ => serve(words, &intro),
    }
}

/// What is above the options in the usage.
fn intro() -> String {
    let mut text = String::from("\nUsage: zeroring [command] [options]\n\nCommands\n\n");
    for (name, what) in COMMANDS {
        text.push_str(&format!("  {name:<10} {what}\n"));
    }
    text.push_str("\nOptions of `run`: flags, or environment variables, or a file `.env`\n");
    text
}

/// What the words and the environment amount to.
#[derive(Debug)]
enum Intent {
    Run(Box<Loaded>),
    Help,
    Unknown(Vec<String>),
    BadOption(OptionError),
    BadConfig(ConfigError),
}

fn intent(words: &[String], env: &BTreeMap<String, String>, around: &Surroundings) -> Intent {
    let settings = match parse::parse(words, env) {
        Ok(Parsed::Settings(settings)) => settings,
        Ok(Parsed::Help) => return Intent::Help,
        Ok(Parsed::Unknown(unknown)) => return Intent::Unknown(unknown),
        Err(error) => return Intent::BadOption(error),
    };
    match Options::load(&settings, around) {
        Ok(loaded) => match loaded.options.check_supported() {
            Ok(()) => Intent::Run(Box::new(loaded)),
            Err(error) => Intent::BadConfig(error),
        },
        Err(error) => Intent::BadConfig(error),
    }
}

fn serve(words: &[String], intro: &str) -> Exit {
    let env = options::environment();
    let mut around = surroundings(&env);
    let mut notes = Vec::new();
    if let Some(uri) = env.get(context::ECS_METADATA) {
        match context::ecs_task_id(uri) {
            Ok(id) => around.ecs_task_id = Some(id),
            Err(error) => notes
                .push(format!("unable to determine task ID. falling back to random ID: {error}")),
        }
    }
    match intent(words, &env, &around) {
        Intent::Run(mut loaded) => {
            loaded.notes.append(&mut notes);
            run::run(*loaded, &env, run::Hooks::default())
        }
        Intent::Help => {
            print(&format!("{intro}{}", help::usage()));
            Exit::Done
        }
        Intent::Unknown(words) => {
            // The original ends with 0 here: a restart loop would not help.
            print_err(&format!("Invalid arguments: {words:?}\n"));
            print(&help::usage());
            Exit::Done
        }
        Intent::BadOption(error) => {
            print_err(&format!("{error}\n"));
            print(&help::usage());
            Exit::Failed
        }
        Intent::BadConfig(error) => {
            let format = env.get("ZERO_LOG_FORMAT").filter(|f| *f == "json");
            let format = if format.is_some() { LogFormat::Json } else { LogFormat::Text };
            logging::install(format, options::config::LogLevel::Info);
            tracing::error!("exiting with error: {error}");
            Exit::Failed
        }
    }
}

/// The load generator is a program of its own, so that nothing of it is in a server: this becomes
/// the one beside this binary, or the one on the PATH.
fn loadtest(words: &[String]) -> Exit {
    let beside = std::env::current_exe().ok().map(|me| me.with_file_name(LOADTEST));
    let program = beside.filter(|file| file.is_file()).unwrap_or_else(|| LOADTEST.into());
    // Returns only if it fails.
    let error = std::process::Command::new(&program).args(words).exec();
    let reason = if error.kind() == std::io::ErrorKind::NotFound {
        format!(
            "`{LOADTEST}` is neither beside this program nor on the PATH. It comes from the same \
             sources: cargo build --release -p zeroring-loadtest"
        )
    } else {
        format!("{}: {error}", program.display())
    };
    print_err(&format!("{reason}\n"));
    Exit::Failed
}

fn capacity(words: &[String]) -> Exit {
    let env = options::environment();
    match capacity::run(words, env.get("ZERO_ADMIN_PASSWORD").map(String::as_str)) {
        Ok(text) => {
            print(&text);
            Exit::Done
        }
        Err(error) => {
            print_err(&format!("{error}\n"));
            Exit::Failed
        }
    }
}

/// The demo: the sample database, the server on it, and the page.
fn demo(words: &[String]) -> Exit {
    if !words.is_empty() {
        print_err("`zeroring demo` takes no options.\n");
        return Exit::Failed;
    }
    match super::run::demo() {
        Ok(exit) => exit,
        Err(error) => {
            print_err(&format!("{error}\n"));
            Exit::Failed
        }
    }
}

/// What the environment says beside the options. `ecs_task_id` is left open: it takes a request.
fn surroundings(env: &BTreeMap<String, String>) -> Surroundings {
    Surroundings {
        node_env: env.get("NODE_ENV").cloned(),
        socket_inactivity_ms: env.get("ZERO_PG_SOCKET_INACTIVITY_TIMEOUT").cloned(),
        ecs_task_id: None,
        ecs: env.contains_key(context::ECS_METADATA),
        random_id: random_id(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// 21 characters of the URL-safe base64 alphabet, as the original's ids.
fn random_id() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    (0..21).map(|_| char::from(ALPHABET[usize::from(rand::random::<u8>() & 63)])).collect()
}

/// Prints without panicking on a closed pipe.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn print_err(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn intent_of(text: &str, vars: &[(&str, &str)]) -> Intent {
        let env = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        intent(&words(text), &env, &surroundings(&env))
    }

    #[test]
    fn options_errors_and_unsupported_roles_are_told_before_anything_starts() {
        assert!(matches!(intent_of("", &[]), Intent::BadOption(OptionError::Missing { .. })));
        let db = ("ZERO_UPSTREAM_DB", "postgres://h/d");
        assert!(matches!(intent_of("", &[db]), Intent::BadConfig(ConfigError::Rule(_))));
        let development = [db, ("NODE_ENV", "development")];
        assert!(matches!(
            intent_of("--num-sync-workers 0", &development),
            Intent::BadConfig(ConfigError::NotYet { .. })
        ));
        assert!(matches!(intent_of("--cvr-db embedded", &development), Intent::Run(_)));
        assert!(matches!(intent_of("--help", &development), Intent::Help));
        assert!(matches!(intent_of("nonsense", &development), Intent::Unknown(_)));
    }

    #[test]
    fn ids_are_21_safe_characters_and_differ() {
        let (a, b) = (random_id(), random_id());
        assert!(
            a.len() == 21 && a.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        );
        assert_ne!(a, b);
    }
}
