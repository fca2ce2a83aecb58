// Compiles shader variants with Dawn: `node tint.mjs <folder with node_modules> <jobs.json> <results.json> [adapter]`.
//
// jobs: [{label, code, entries: [{binding, type}], constants: {name: number}}]. results: {adapters: [name], failures: [[index, adapter, message]]}.
// Dawn's null backend parses, validates, substitutes overrides and checks WebGPU's default limits with no GPU at all. With `adapter`,
// each variant is then also compiled to the end for the real adapter that Dawn chooses, if that has the features.
// Exit code 3: Dawn cannot be loaded here. 4: there is no real adapter.
import { createRequire } from 'node:module';
import { readFileSync, writeFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [folder, jobsPath, resultsPath, real] = process.argv.slice(2);
const { create, globals } = await load();
Object.assign(globalThis, globals);

async function load() {
  try {
    const entry = createRequire(resolve(folder, 'package.json')).resolve('webgpu');
    return await import(pathToFileURL(entry).href);
  } catch (error) {
    console.error(error.message);
    process.exit(3);
  }
}

const instances = []; // Dawn crashes where its instance is collected before the device

async function open(flags) {
  let adapter = null;
  try {
    instances.push(create(flags));
    adapter = await instances.at(-1).requestAdapter();
  } catch {}
  if (adapter === null) return null;
  const features = ['shader-f16', 'subgroups'].filter((name) => adapter.features.has(name));
  const device = await adapter.requestDevice({ requiredFeatures: features });
  return { name: adapter.info.description || flags.join() || 'adapter', features, device };
}

async function compile(device, job) {
  device.pushErrorScope('validation');
  const problems = [];
  try {
    const module = device.createShaderModule({ label: job.label, code: job.code });
    const { messages } = await module.getCompilationInfo();
    const line = (n) => (job.code.split('\n')[n - 1] ?? '').trim();
    for (const m of messages) if (m.type === 'error') problems.push(`${m.message} (line ${m.lineNum}: ${line(m.lineNum)})`);
    const storage = job.entries.filter(({ type }) => type !== 'uniform').length;
    const most = device.limits.maxStorageBuffersPerShaderStage;
    if (problems.length === 0 && storage > most) {
      // such a kernel is chosen only where the device has the limit; the module was compiled all the same
      problems.push(`the number of storage buffers (${storage}) exceeds the maximum allowed (${most})`);
    } else if (problems.length === 0) {
      const entries = job.entries.map(({ binding, type }) => ({ binding, visibility: GPUShaderStage.COMPUTE, buffer: { type } }));
      const layout = device.createPipelineLayout({ bindGroupLayouts: [device.createBindGroupLayout({ entries })] });
      await device.createComputePipelineAsync({ label: job.label, layout, compute: { module, entryPoint: 'main', constants: job.constants } });
    }
  } catch (error) {
    problems.push(error.message);
  }
  const scope = await device.popErrorScope();
  if (scope && problems.length === 0) problems.push(scope.message);
  return problems.join('\n');
}

const jobs = JSON.parse(readFileSync(jobsPath, 'utf8'));
const devices = [await open(['backend=null'])];
if (real) devices.push(await open([]));
if (devices.includes(null)) {
  console.error('Dawn found no adapter that it accepts');
  process.exit(4);
}
const failures = [];
for (const [index, job] of jobs.entries()) {
  for (const { name, features, device } of devices) {
    if (/^enable f16;/m.test(job.code) && !features.includes('shader-f16')) continue;
    if (/^enable subgroups;/m.test(job.code) && !features.includes('subgroups')) continue;
    const problem = await compile(device, job);
    if (problem) failures.push([index, name, problem]);
  }
}
writeFileSync(resultsPath, JSON.stringify({ adapters: devices.map(({ name }) => name), failures }));
process.exit(0);
