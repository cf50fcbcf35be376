// What the server tells of its stages (`/pipeline`), in words and as what has changed since.

export const SETTLED = 3; // seconds: a handshake younger than a look and this is new

export function proof(stage) {
  switch (stage.evidence) {
    case "nitro":
      return {
        grade: "good",
        what: "Attested by AWS Nitro",
        how: "A document signed for this very connection names the image that runs; it is the one the manifest pins.",
        mark: stage.measurement,
      };
    case "key_only":
      return {
        grade: "fair",
        what: "Key only",
        how: "It holds the key that the manifest names. What code runs there is not proved: its owner can read along.",
      };
    case "dev":
      return {
        grade: "poor",
        what: "Development evidence",
        how: "Signed by a local development authority: whoever runs the machine can read along.",
      };
    case null:
    case undefined:
      return { grade: "none", what: "Nothing proved yet", how: "No connection stands." };
    default:
      return { grade: "fair", what: `Evidence: ${stage.evidence}`, how: "See the server's manual.", mark: stage.measurement };
  }
}

// What has happened between two looks, `seconds` apart, in the order to be told in.
export function changes(before, now, seconds) {
  if (!before) return now.is_ready ? [{ kind: "good", text: "All stages are there." }] : [];
  const told = [];
  const names = (stages) => stages.map((stage) => stage.stage_idx).join(", ");
  const was = new Map(before.stages.map((stage) => [stage.stage_idx, stage]));
  const gone = now.stages.filter((stage) => stage.state !== "ready" && was.get(stage.stage_idx)?.state === "ready");
  if (gone.length) told.push({ kind: "poor", text: `Stage ${names(gone)} is away; answers wait.` });
  const failovers = now.engine.num_failovers - before.engine.num_failovers;
  if (failovers > 0) {
    const fresh = now.stages.filter((stage) => stage.handshake_age_seconds !== null && stage.handshake_age_seconds < seconds + SETTLED);
    const who = fresh.length ? `Stage ${names(fresh)} was lost and is back` : "A connection was lost and is back";
    const kept = now.engine.num_running ? `; ${count(now.engine.num_running, "answer")} went on` : "";
    told.push({ kind: "failover", text: `${who}: ${now.engine.recovery_seconds.toFixed(2)} s${kept}.` });
  } else if (now.is_ready && !before.is_ready) {
    told.push({ kind: "good", text: "All stages are there." });
  }
  return told;
}

export function trouble(view) {
  if (view.is_ready) return "";
  const away = view.stages.filter((stage) => stage.state !== "ready").map((stage) => stage.stage_idx);
  return away.length ? `stage ${away.join(", ")} is away` : "the pipeline is being mended";
}

export const count = (number, what) => `${number} ${what}${Number(number) === 1 ? "" : "s"}`;
export const percent = (share) => `${Math.round(100 * share)} %`;

export function bytes(value) {
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return `${unit === "B" || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} GB`;
}

export function age(seconds) {
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(0)} h`;
}

export const ms = (value) => (value < 10 ? value.toFixed(2) : value.toFixed(1));
