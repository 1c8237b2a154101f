//! A school whose rules say who may see what: rules are EXISTS of the system, whose rows stay on
//! the server; queries of applications add their own.

use serde_json::json;

use super::DataSet;
use super::query::{allowed_by, and, cmp, exists, filter, not_exists, or, related, table, with};

const TABLES: &str = "
    school 3: *id name:text
    person 9: *id name:text admin:bool
    staff 6: *person_id>person *school_id>school role:int
    class 6: *id school_id>school title:text teacher_id>person?
    enrolment 14: *class_id>class *person_id>person active:bool
    guardian 6: *parent_id>person *child_id>person
    assignment 9: *id class_id>class title:text due:int? published:bool
    grade 14: *id assignment_id>assignment person_id>person? points:int?
";

/// Who asks.
const ME: u32 = 2;

pub(super) fn data_set() -> Result<DataSet, String> {
    let me = |column: &str| cmp(column, "=", ME);
    let staff = || allowed_by("school_id=school_id", filter(table("staff"), me("person_id")));
    let enrolled =
        || filter(table("enrolment"), and(vec![me("person_id"), cmp("active", "=", true)]));
    let sees_class = || or(vec![me("teacher_id"), staff(), allowed_by("id=class_id", enrolled())]);
    let teaches = || allowed_by("class_id=id", filter(table("class"), me("teacher_id")));
    let sees_assignment = || {
        let published =
            and(vec![cmp("published", "=", true), allowed_by("class_id=class_id", enrolled())]);
        or(vec![teaches(), published])
    };
    let my_child = || filter(table("guardian"), me("parent_id"));
    let sees_grade = || {
        let of_class = allowed_by("assignment_id=id", filter(table("assignment"), teaches()));
        or(vec![me("person_id"), of_class, allowed_by("person_id=child_id", my_child())])
    };
    let queries = vec![
        ("my classes with their open assignments", {
            let open = and(vec![sees_assignment(), cmp("due", ">=", 2)]);
            let assignments = with(
                filter(table("assignment"), open),
                json!({"orderBy": [["due", "asc"]], "limit": 2}),
            );
            related(filter(table("class"), sees_class()), "assignments", "id=class_id", assignments)
        }),
        (
            "grades that I may see, best first",
            with(
                related(
                    filter(table("grade"), sees_grade()),
                    "assignment",
                    "assignment_id=id",
                    filter(table("assignment"), sees_assignment()),
                ),
                json!({"orderBy": [["points", "desc"]], "limit": 4}),
            ),
        ),
        ("assignments without a grade in classes that I see", {
            let class = exists("class_id=id", filter(table("class"), sees_class()));
            filter(
                table("assignment"),
                and(vec![
                    class,
                    not_exists("id=assignment_id", filter(table("grade"), sees_grade())),
                ]),
            )
        }),
        ("people who share a class with my child", {
            let child = exists("person_id=child_id", my_child());
            let class = exists("class_id=class_id", filter(table("enrolment"), child));
            filter(table("person"), exists("id=person_id", filter(table("enrolment"), class)))
        }),
        ("schools where nobody is on the staff but admins", {
            let no_admin = filter(
                table("staff"),
                not_exists("person_id=id", filter(table("person"), cmp("admin", "=", true))),
            );
            filter(table("school"), not_exists("id=school_id", no_admin))
        }),
        ("classes of schools where I have a role above one", {
            let role = filter(table("staff"), and(vec![me("person_id"), cmp("role", ">", 1)]));
            let class = filter(table("class"), allowed_by("school_id=school_id", role));
            let pupils = related(table("enrolment"), "person", "person_id=id", table("person"));
            related(class, "enrolments", "id=class_id", pupils)
        }),
        ("nothing: denied", filter(table("grade"), or(vec![]))),
        (
            "all people, those of another rule among them",
            filter(
                table("person"),
                or(vec![
                    me("id"),
                    cmp("admin", "=", true),
                    allowed_by("id=child_id", my_child()),
                    allowed_by(
                        "id=person_id",
                        filter(
                            table("enrolment"),
                            allowed_by("class_id=id", filter(table("class"), me("teacher_id"))),
                        ),
                    ),
                ]),
            ),
        ),
    ];
    DataSet::new("school", TABLES, queries)
}
